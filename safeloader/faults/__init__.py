"""What can go wrong, in words: exit statuses, incidents, and the limits of the machine."""
