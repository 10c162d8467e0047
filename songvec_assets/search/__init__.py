"""What the table is for: the songs nearest to a query, and a preview of what a search finds."""
