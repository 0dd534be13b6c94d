"""What one optimizer step touches, and the loop around it."""
