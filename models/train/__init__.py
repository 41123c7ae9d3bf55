"""Training, from scratch or of a memory for an existing model: data, optimizer, the loop, the command meki-train."""
