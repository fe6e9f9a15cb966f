"""A soak of a server: many clients for a long time, of which many behave badly."""
