package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"scoria/driver/control"
)

func (a *app) jobCommand() *cobra.Command {
	list := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List jobs that run or ended lately", Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			jobs, err := a.client().Jobs(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(jobs, func(w *tabwriter.Writer) {
				row(w, "ID", "KIND", "VOLUME", "STATE", "PROGRESS", "STARTED")
				for i := range jobs {
					row(w, jobs[i].ID, jobs[i].Kind, jobs[i].Volume, jobs[i].State, percent(&jobs[i]), printTime(jobs[i].Started))
				}
			})
		},
	}
	cancel := &cobra.Command{
		Use: "cancel ID", Short: "Stop a job", Args: args("ID"),
		RunE: func(cmd *cobra.Command, got []string) error {
			j, err := a.client().CancelJob(cmd.Context(), got[0])
			if err != nil {
				return err
			}
			return a.print(j, func(w *tabwriter.Writer) { row(w, "asked to stop", fmt.Sprintf("%s of %s", j.Kind, j.Volume)) })
		},
	}
	return group("job", "List and stop long operations", list, cancel)
}

func percent(j *control.Job) string {
	switch {
	case j.State == control.JobDone:
		return "100%"
	case j.Total <= 0:
		return ""
	}
	return fmt.Sprintf("%d%%", min(max(j.Done, 0), j.Total)*100/j.Total)
}

// runJob starts a volume's job and follows it to its end.
func (a *app) runJob(ctx context.Context, volume string, start func(c *control.Client, name string) (control.Job, error)) (control.Job, error) {
	name, err := fullName(volume)
	if err != nil {
		return control.Job{}, err
	}
	c := a.client()
	j, err := start(c, name)
	if err != nil {
		return j, err
	}
	return a.await(ctx, c, j)
}

// await follows a job to its end with a bar on the terminal. An interrupt
// cancels the job and waits for that.
func (a *app) await(ctx context.Context, c *control.Client, j control.Job) (control.Job, error) {
	began := time.Now()
	width := a.barWidth()
	shown := false
	show := func(j control.Job) {
		// What ends at once needs no bar.
		if width > 0 && time.Since(began) > 300*time.Millisecond {
			shown = true
			fmt.Fprintf(a.errOut, "\r%s", bar(&j, time.Since(began), width))
		}
	}
	last, err := c.Await(ctx, j, show)
	if ctx.Err() != nil {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if _, err = c.CancelJob(late, j.ID); err == nil {
			last, err = c.Await(late, j, nil)
		}
	}
	if shown {
		fmt.Fprintf(a.errOut, "\r%*s\r", width, "")
	}
	return last, err
}

// barWidth returns how many columns a progress bar has, 0 for none.
func (a *app) barWidth() int {
	f, ok := a.errOut.(*os.File)
	if a.quiet || !ok {
		return 0
	}
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	return min(int(ws.Col), 100) - 1
}

// bar draws a job's progress in width columns.
func bar(j *control.Job, took time.Duration, width int) string {
	head := j.Kind + " " + j.Volume + " "
	if j.Total <= 0 {
		return fmt.Sprintf("%-*s", width, clip(head+"… "+took.Round(time.Second).String(), width))
	}
	done := float64(min(max(j.Done, 0), j.Total)) / float64(j.Total)
	tail := fmt.Sprintf(" %4s", percent(j))
	if done > 0 && done < 1 {
		left := time.Duration(float64(took) * (1 - done) / done)
		tail += fmt.Sprintf(" %8s left", left.Round(time.Second))
	}
	room := width - len(head) - len(tail) - 2
	if room < 5 {
		return fmt.Sprintf("%-*s", width, clip(head+tail, width))
	}
	filled := int(done * float64(room))
	return fmt.Sprintf("%-*s", width, head+"["+strings.Repeat("=", filled)+strings.Repeat(" ", room-filled)+"]"+tail)
}

func clip(s string, width int) string {
	if r := []rune(s); len(r) > width {
		return string(r[:max(width, 0)])
	}
	return s
}
