"""Fuzz targets, those in C++ beside them; run from the repository's root (fuzz/run)."""
