# Prints the tests that mirror what differs from main: committed or not, and new files.
# jaxsoftmax/_rows/xla.py has tests/rows/test_xla*.py, or all of tests/rows; a module
# that nothing mirrors, and what all tests use, has all tests.
for main in origin/main main HEAD; do
  base=$(git merge-base HEAD "$main" 2>/dev/null) && break
done
{ git diff --name-only --diff-filter=d "$base"; git ls-files -o --exclude-standard; } |
while read -r file; do
  name=$(basename "$file" .py | sed 's/^_//')
  family=tests/$(basename "$(dirname "$file")" | sed 's/^_//')
  case $file in
    tests/gpu/*) ;;
    tests/*test_*.py) echo "$file" ;;
    jaxsoftmax/*.py)
      mirror=$(find tests -name "test_$name*.py" 2>/dev/null | sort -u)
      ours=$(echo "$mirror" | grep "^$family/")
      if [ -d "$family" ]; then echo "${ours:-$family}"; else echo "${mirror:-tests}"; fi ;;
    tests/* | pyproject.toml) echo tests ;;
    docs/differences_*) find tests -name test_differences.py ;;
    docs/* | *.md) find tests -name test_docs.py ;;
  esac
done | sort -u
