"""Pages about results: the report, the study's page, cards and tables of text, and their figures."""
