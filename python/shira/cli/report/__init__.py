"""What `shira report` shows: how adapters interfere, as numbers, a picture and a page."""
