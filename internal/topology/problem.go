package topology

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Problem is one mistake in a file.
type Problem struct {
	File         string // as given to Parse
	Line, Column int    // from 1; the column counts characters
	Field        string // path of the field, such as "nodes.rank0.interfaces[0].mac"; empty for the file as a whole
	Message      string // what is wrong
	Hint         string // what to do about it
}

// String is the problem in one line, in the form that editors can follow.
func (p Problem) String() string {
	s := fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Message)
	if p.Hint != "" {
		s += "; " + p.Hint
	}
	return s
}

// Error is every mistake in a file, sorted by position. There is at least one.
type Error struct {
	Problems []Problem
}

// Error has one line a problem.
func (e *Error) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// tidy sorts problems by position.
func tidy(ps []Problem) []Problem {
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	// What an alias repeats is told once.
	return slices.CompactFunc(ps, func(a, b Problem) bool {
		return a.Line == b.Line && a.Column == b.Column && a.Message == b.Message
	})
}

// suggest says what may have been meant by a word that is none of the known
// ones: the nearest of them, or all.
func suggest(word string, known []string) string {
	words := make([]string, len(known))
	for i, k := range known {
		words[i] = plain(k)
	}
	best, least := "", 3 // more than two letters off is another word
	for _, k := range known {
		if d := distance(word, k); d < least && d < len(k) {
			best, least = k, d
		}
	}
	const most = 12
	switch {
	case len(known) == 0:
		return "define one first"
	case best != "":
		return fmt.Sprintf("did you mean %s?", plain(best))
	case len(known) == 1:
		return fmt.Sprintf("there is only %s", words[0])
	case len(known) > most:
		return fmt.Sprintf("there are %s, ... (%d in all)", strings.Join(words[:most], ", "), len(known))
	default:
		return fmt.Sprintf("there are %s", strings.Join(words, ", "))
	}
}

// distance is the number of letters to insert, delete or replace (Levenshtein).
// Words that are far longer than a name are far from any.
func distance(a, b string) int {
	if len(a) > 80 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replace := diagonal
			if a[i] != b[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
