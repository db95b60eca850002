# COPY: unpacks the archive on standard input and puts what SOURCE names to TARGET, as Docker does.
# words: SOURCE TARGET OWNER FILE_MODE DIR_MODE UNPACK DIRECTORY(of relative targets)
set -e
shopt -s dotglob globstar nullglob
source=$1 target=$2 owner=$3 file_mode=$4 dir_mode=$5 unpack=$6 directory=$7
work=$(mktemp -d /var/tmp/nidus-copy.XXXXXX)
trap 'rm -rf "$work"' EXIT
tar "$unpack" - -C "$work"
case "$target" in
    /*) path=$target ;;
    *) path=$directory/$target ;;
esac
id "${owner%%:*}" >/dev/null 2>&1 || { echo "there is no user ${owner%%:*}" >&2; exit 1; }
case "$owner" in
    *:*) ;;
    *) owner=$owner:$(id -gn "$owner") ;;
esac
chown -hR "$owner" "$work"
if [ -n "$file_mode" ]; then
    find "$work" -mindepth 1 -type f -exec chmod "$file_mode" {} +
    find "$work" -mindepth 1 -type d -exec chmod "$dir_mode" {} +
fi
made() { # makes a directory and those above it; the last one is the owner's if it is new
    if [ ! -d "$1" ]; then
        mkdir -p "$1"
        chown "$owner" "$1"
    fi
}
put() { # FROM TO
    if [ -d "$1" ] && [ ! -L "$1" ]; then
        made "$2"
        cp -a "$1/." "$2/"
    else
        cp -a "$1" "$2"
    fi
}
cd "$work"
source=${source#./}
[ -n "$source" ] || source=.
if [ -e "$source" ] || [ -L "$source" ]; then
    if [ -d "$source" ] && [ ! -L "$source" ]; then
        put "$source" "$path"
    else
        case "$path" in
            */) made "$path" ;;
            *) [ -d "$path" ] || made "$(dirname "$path")" ;;
        esac
        [ -d "$path" ] && path=${path%/}/$(basename "$source")
        put "$source" "$path"
    fi
    exit 0
fi
found=
last=
IFS=
for entry in $source; do
    case "$entry" in "$last"/*) [ -n "$last" ] && continue ;; esac
    found=1
    last=$entry
    made "$path"
    if [ -d "$entry" ] && [ ! -L "$entry" ]; then
        put "$entry" "$path"
    else
        put "$entry" "${path%/}/$(basename "$entry")"
    fi
done
[ -n "$found" ] || { echo "the upload has nothing that '$source' names" >&2; exit 1; }
