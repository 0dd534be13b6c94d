"""Networks rewritten in a copy: cheap blocks, no shortcuts, folded batch norm."""
