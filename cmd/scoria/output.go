package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"scoria/driver/control"
)

// print writes v as JSON, or calls table.
func (a *app) print(v any, table func(w *tabwriter.Writer)) error {
	if a.output == "json" {
		e := json.NewEncoder(a.out)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	table(w)
	return w.Flush()
}

// row writes one line of a table. Cells that are empty show a dash.
func row(w io.Writer, cells ...any) {
	text := make([]string, len(cells))
	for i, c := range cells {
		if text[i] = fmt.Sprint(c); text[i] == "" {
			text[i] = "-"
		}
	}
	fmt.Fprintln(w, strings.Join(text, "\t"))
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func printTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

// printConditions says what slows, pauses or degrades something.
func printConditions(w io.Writer, list []control.Condition) {
	if len(list) == 0 {
		row(w, "conditions", "none")
	}
	for _, c := range list {
		row(w, "condition", c.Code+": "+c.Message)
	}
}
