"""Shortlist, the service: events and catalogue in SQL, rankings over HTTP, training runs."""
