"""Training from scratch: data, optimizer, the loop, and the command meki-train."""
