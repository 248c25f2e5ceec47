"""Quality of predictions from one weight posterior, by one pass, by draws, and by other packages."""
