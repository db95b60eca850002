//! Guest memory: the private mapping of a template's memfile and what was written to it
