"""The brick transformer: one model, whose bricks a family chooses."""
