#!/bin/sh -e
# Sound becomes subtitles.
case "$INPUT_FILE_PATH" in *.wav) ;; *) exit 0 ;; esac
name=$(basename "$INPUT_FILE_PATH" .wav)
audio2srt "$INPUT_FILE_PATH" "$TMP_OUTPUT_DIR/$name.srt"
