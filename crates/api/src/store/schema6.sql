-- What a team may do: sandboxes that run at once (0 is without a limit), and why it may do nothing.
ALTER TABLE teams ADD COLUMN max_sandboxes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE teams ADD COLUMN blocked TEXT;
-- Tokens that manage a team's keys. As with keys, hash is the SHA-256 of the text.
CREATE TABLE access_tokens (
    id TEXT PRIMARY KEY,
    team_id TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    hash BLOB NOT NULL UNIQUE,
    mask TEXT NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;
-- Values that only network rules get to see; sealed with the key of the data directory.
CREATE TABLE secrets (
    id TEXT PRIMARY KEY,
    team_id TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    sealed BLOB NOT NULL,
    metadata TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    UNIQUE (team_id, name)
) STRICT;
-- Files that outlive sandboxes. The node has the files.
CREATE TABLE volumes (
    id TEXT PRIMARY KEY,
    team_id TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    UNIQUE (team_id, name)
) STRICT;
-- Which build a tag stood for, and since when; the last one of a tag is the one it stands for.
CREATE TABLE tag_assignments (
    id TEXT PRIMARY KEY,
    template_id TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    tag TEXT NOT NULL,
    build_id TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
    assigned_at INTEGER NOT NULL
) STRICT;
CREATE INDEX assignments_of_tag ON tag_assignments (template_id, tag, assigned_at);
INSERT INTO tag_assignments (id, template_id, tag, build_id, assigned_at)
    SELECT lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-a'
        || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6))), template_id, tag, build_id, created_at FROM tags;
