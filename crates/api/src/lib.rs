//! Public REST API: keys, teams, templates by name, placement of sandboxes over nodes
