"""Files that a version of the `generate` model carries with it. They run inside the server and import nothing of flora-export."""
