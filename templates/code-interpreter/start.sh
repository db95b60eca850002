#!/bin/sh
# Keeps the server of the code interpreter running. What it has open ends with it, so a new one finds nothing in its way.
cd /opt/interpreter || exit 1
export HOME=/root NODE_PATH=/usr/share/nodejs:/usr/local/lib/node_modules:/usr/lib/node_modules
unset SUDO_COMMAND SUDO_USER SUDO_UID SUDO_GID
while :; do
    /usr/bin/python3 -m interpreter.server
    # It ended by itself or was killed: not at once, in case that it cannot begin.
    sleep 0.3
done
