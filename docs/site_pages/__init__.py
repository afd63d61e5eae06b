"""Text that docs/conf.py adds to the pages while the site is built."""
