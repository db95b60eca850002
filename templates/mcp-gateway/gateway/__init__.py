"""A gateway to MCP servers: many that speak over pipes, as one that speaks over HTTP."""
