-- Whether the build of a paused sandbox is its disk alone.
ALTER TABLE snapshots ADD COLUMN filesystem_only INTEGER NOT NULL DEFAULT 0;
