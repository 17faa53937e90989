"""What makes and checks the pages of this folder."""
