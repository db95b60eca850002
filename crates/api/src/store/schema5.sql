-- Names of builds within their template; the one without a name has the tag "default".
CREATE TABLE tags (
    template_id TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    tag TEXT NOT NULL,
    build_id TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (template_id, tag)
) STRICT;
-- Tags that a build gets when it is ready, with commas between.
ALTER TABLE builds ADD COLUMN wanted_tags TEXT NOT NULL DEFAULT '';
-- The step that a build failed in, and the build that has the state before it.
ALTER TABLE builds ADD COLUMN failed_step TEXT;
ALTER TABLE builds ADD COLUMN failed_layer TEXT;
