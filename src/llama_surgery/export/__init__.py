"""Topologies as files, for other hardware and other tools."""
