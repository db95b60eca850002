-- Builds of paused sandboxes. The newest paused one is what its sandbox is resumed from; older ones
-- are kept while newer ones read their files.
CREATE TABLE snapshots (
    build_id TEXT PRIMARY KEY,
    sandbox_id TEXT NOT NULL,
    team_id TEXT NOT NULL REFERENCES teams (id),
    status TEXT NOT NULL CHECK (status IN ('pausing', 'paused')),
    -- SandboxConfig of the node's protocol, as it is resumed
    config BLOB NOT NULL,
    started_at INTEGER NOT NULL,
    paused_at INTEGER NOT NULL
) STRICT;
CREATE INDEX snapshots_of_sandbox ON snapshots (sandbox_id);
