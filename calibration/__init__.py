"""What a quantiser needs to know about a checkpoint: importance matrices read and written."""
