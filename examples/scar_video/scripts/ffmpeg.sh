#!/bin/sh -e
# A film becomes its picture and its sound: 16 kHz, mono.
name=$(basename "$INPUT_FILE_PATH"); name=${name%.*}
ffmpeg -i "$INPUT_FILE_PATH" -vn -ar 16000 -ac 1 "$TMP_OUTPUT_DIR/$name.wav"
ffmpeg -i "$INPUT_FILE_PATH" -an "$TMP_OUTPUT_DIR/$name.y4m"
