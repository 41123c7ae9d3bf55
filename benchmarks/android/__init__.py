"""Decode and prefill on a phone, through adb."""
