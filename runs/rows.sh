# Sourced by methods.sh, study.sh and metaworld.sh. Their function `rows` lists every row as NAME SEED and further words.

# List the rows that are not finished, of those in ROWS where it is set. A name in ROWS that is no row is an error.
open_rows() {
  local known name seed rest
  known=$(rows | awk '{ print $1 "_" $2 }' | tr '\n' ' ')
  for name in ${ROWS:-}; do
    if [[ " $known" != *" $name "* ]]; then
      echo "ROWS: expected names of rows with their seed, got $name; available: $known" >&2
      return 2
    fi
  done
  rows | while read -r name seed rest; do
    [ -f "$MEASURED/${name}_$seed/row.json" ] && continue
    [ -n "${ROWS:-}" ] && [[ " $ROWS " != *" ${name}_$seed "* ]] && continue
    echo "$name $seed $rest"
  done
}
