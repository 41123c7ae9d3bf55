"""Times of compiled graphs on real chips, in Qualcomm's AI Hub."""
