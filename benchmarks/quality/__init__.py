"""What quantisation costs in the quality of the results."""
