"""The HTTP door: searches as JSON, and one page that shows them."""
