"""Whole tables from one command: profiles, plans, sweeps."""
