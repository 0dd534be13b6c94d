"""What happens to a picture after it is cut: policies of random operations, erased rectangles."""
