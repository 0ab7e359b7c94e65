"""Container image, compose file and chart."""
