-- The sandbox that a template is a snapshot of; none for one that was built.
ALTER TABLE templates ADD COLUMN snapshot_of TEXT;
-- Builds made of sandboxes that neither a template nor a paused sandbox has: they are being made, or
-- forks run from them, or others read them. They are deleted once nobody needs them.
CREATE TABLE checkpoints (
    build_id TEXT PRIMARY KEY,
    template_id TEXT NOT NULL
) STRICT;
