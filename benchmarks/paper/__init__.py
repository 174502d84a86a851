"""Tables and figures of the ICCV 2025 paper (arXiv 2507.16782), on any detector and set."""
