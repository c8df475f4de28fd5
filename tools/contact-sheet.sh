#!/usr/bin/env bash
# contact-sheet.sh PROMPTS DIR PICTURE: one row of frames per prompt, made from DIR/ID.mp4, with the prompt beside it.
# PROMPTS is read by pattern, so each line has to have "id" and "prompt" without escapes, as the demo's has.
set -euo pipefail

prompts=$1 dir=$2 picture=$3
font=/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf
frame=72 columns=9 every=3 # pixels; frames in a row; every so many frames of the clip
text=460                   # pixels

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

field() { # field NAME LINE
  sed -n 's/.*"'"$1"'": *"\([^"\\]*\)".*/\1/p' <<<"$2"
}

rows=()
while IFS= read -r line; do
  [ -n "$line" ] || continue
  id=$(field id "$line")
  row=$work/$(printf '%04d' ${#rows[@]}).png
  # From a file, the text needs no escaping.
  field prompt "$line" | tr -d '\n' >"$work/text"
  ffmpeg -nostdin -v error -y -i "$dir/$id.mp4" -frames:v 1 -vf "select=not(mod(n\,$every)),\
scale=$frame:$frame:force_original_aspect_ratio=decrease:flags=neighbor,\
pad=$frame+4:$frame+4:(ow-iw)/2:(oh-ih)/2:color=0x303030,tile=${columns}x1,\
pad=iw+$text:ih:0:0:color=0x303030,\
drawtext=fontfile=$font:textfile=$work/text:fontsize=15:fontcolor=white:x=w-$text+12:y=(h-text_h)/2" "$row"
  rows+=(-i "$row")
done <"$prompts"

count=$((${#rows[@]} / 2))
ffmpeg -nostdin -v error -y "${rows[@]}" -filter_complex "vstack=inputs=$count" -frames:v 1 "$picture"
