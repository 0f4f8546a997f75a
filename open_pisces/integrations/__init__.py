"""Adapters through which tools of others drive a Pisces; none of those tools is needed to import them."""
