"""What a version of the `generate` model runs inside the server. It imports nothing of flora-export."""
