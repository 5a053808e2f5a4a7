"""What must be manual on each device: attention, cross-entropy, embedding. Each works on global arrays inside a mesh."""
