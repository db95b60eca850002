-- The tables as of version 6, for Postgres. What they mean is said in schema*.sql, which make the same in SQLite.
-- Columns that are called rowid there without being named are real ones here.
CREATE TABLE schema_version (version BIGINT NOT NULL);
INSERT INTO schema_version VALUES (0);
CREATE TABLE teams (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    max_sandboxes BIGINT NOT NULL DEFAULT 0,
    blocked TEXT
);
CREATE TABLE api_keys (
    id TEXT PRIMARY KEY,
    team_id TEXT NOT NULL REFERENCES teams (id),
    name TEXT NOT NULL,
    hash BYTEA NOT NULL UNIQUE,
    mask TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    last_used BIGINT
);
CREATE TABLE access_tokens (
    id TEXT PRIMARY KEY,
    team_id TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    hash BYTEA NOT NULL UNIQUE,
    mask TEXT NOT NULL,
    created_at BIGINT NOT NULL
);
CREATE TABLE templates (
    rowid BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE,
    id TEXT PRIMARY KEY,
    team_id TEXT NOT NULL REFERENCES teams (id),
    public BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    spawn_count BIGINT NOT NULL DEFAULT 0,
    last_spawned_at BIGINT,
    snapshot_of TEXT
);
CREATE TABLE aliases (
    alias TEXT PRIMARY KEY,
    template_id TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE
);
CREATE TABLE builds (
    rowid BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE,
    id TEXT PRIMARY KEY,
    template_id TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    status TEXT NOT NULL CHECK (status IN ('waiting', 'building', 'ready', 'error')),
    reason TEXT,
    cpu_count BIGINT NOT NULL,
    memory_mb BIGINT NOT NULL,
    disk_mb BIGINT NOT NULL,
    envd_version TEXT NOT NULL DEFAULT '',
    kernel_version TEXT NOT NULL DEFAULT '',
    vmm_version TEXT NOT NULL DEFAULT '',
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    finished_at BIGINT,
    wanted_tags TEXT NOT NULL DEFAULT '',
    failed_step TEXT,
    failed_layer TEXT
);
CREATE INDEX builds_of_template ON builds (template_id, created_at);
CREATE TABLE snapshots (
    rowid BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE,
    build_id TEXT PRIMARY KEY,
    sandbox_id TEXT NOT NULL,
    team_id TEXT NOT NULL REFERENCES teams (id),
    status TEXT NOT NULL CHECK (status IN ('pausing', 'paused')),
    config BYTEA NOT NULL,
    started_at BIGINT NOT NULL,
    paused_at BIGINT NOT NULL,
    filesystem_only BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX snapshots_of_sandbox ON snapshots (sandbox_id);
CREATE TABLE checkpoints (
    rowid BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE,
    build_id TEXT PRIMARY KEY,
    template_id TEXT NOT NULL
);
CREATE TABLE tags (
    template_id TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    tag TEXT NOT NULL,
    build_id TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (template_id, tag)
);
CREATE TABLE tag_assignments (
    rowid BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE,
    id TEXT PRIMARY KEY,
    template_id TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    tag TEXT NOT NULL,
    build_id TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
    assigned_at BIGINT NOT NULL
);
CREATE INDEX assignments_of_tag ON tag_assignments (template_id, tag, assigned_at);
CREATE TABLE secrets (
    id TEXT PRIMARY KEY,
    team_id TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    version BIGINT NOT NULL,
    sealed BYTEA NOT NULL,
    metadata TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    UNIQUE (team_id, name)
);
CREATE TABLE volumes (
    id TEXT PRIMARY KEY,
    team_id TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    UNIQUE (team_id, name)
);
