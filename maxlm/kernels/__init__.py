"""What must be manual on each device: attention, cross-entropy, embedding. Each takes global arrays of the mesh."""
