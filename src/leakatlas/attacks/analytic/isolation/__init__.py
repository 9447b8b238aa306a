"""Active attacks that take one client's update out of an aggregate."""
