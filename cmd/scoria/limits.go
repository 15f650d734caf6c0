package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"scoria/driver/control"
	"scoria/driver/limit"
)

// limitFlags are the flags of the settings, in the order in which they are shown.
var limitFlags = []struct{ flag, setting, help string }{
	{"read-iops", "read_iops", "reads per second"},
	{"write-iops", "write_iops", "writes, flushes, discards and zeroings per second"},
	{"iops", "total_iops", "reads and writes together per second"},
	{"read-bps", "read_bps", "bytes read per second, such as 100M"},
	{"write-bps", "write_bps", "bytes written per second"},
	{"bps", "total_bps", "bytes read and written together per second"},
	{"burst", "burst_seconds", "how long a rest is saved up for: so many seconds of each rate may pass at once, such as 5s (default 100ms)"},
	{"burst-requests", "burst_requests", "the same for the limits on requests, as their number"},
	{"burst-bytes", "burst_bytes", "the same for the limits on bytes, as their number, such as 1G"},
}

const limitHelp = `Without flags the limits are shown. A change holds at once, also for a running
guest's requests under way, and is kept. A value is a number, "none" (no such
limit), or "default" (no value of its own%s).

Requests that exceed a limit wait, they don't fail. After a rest a burst passes
unhindered. A request that is larger than the burst passes too, and those after it
wait for it. Flushes are not limited.`

func (a *app) volumeLimit() *cobra.Command {
	cmd := a.limitCommand("limit [POOL/]VOLUME", "Show or change what a volume may do per second",
		fmt.Sprintf(limitHelp, ", the pool's holds"), func(ctx context.Context, name string, req *control.ChangeLimits) (control.Limits, error) {
			name, err := fullName(name)
			if err != nil {
				return control.Limits{}, err
			}
			if req == nil {
				return a.client().Limits(ctx, name)
			}
			return a.client().ChangeLimits(ctx, name, *req)
		}, showVolumeLimits)
	cmd.Example = "  scoria volume limit vm1 --read-iops 500 --write-iops 500 --burst 10s\n  scoria volume limit vm1 --bps 200M\n  scoria volume limit vm1 --clear"
	cmd.ValidArgsFunction = a.completeVolumes
	return cmd
}

func (a *app) poolLimit() *cobra.Command {
	cmd := a.limitCommand("limit POOL", "Show or change what each volume of a pool may do per second",
		"Limits of a pool hold for each of its volumes that has none of that kind itself.\n\n"+fmt.Sprintf(limitHelp, ""),
		func(ctx context.Context, name string, req *control.ChangeLimits) (control.Limits, error) {
			if req == nil {
				return a.client().PoolLimits(ctx, name)
			}
			return a.client().ChangePoolLimits(ctx, name, *req)
		}, showPoolLimits)
	cmd.Example = "  scoria pool limit default --iops 5000 --bps 500M"
	cmd.ValidArgsFunction = a.completePools
	return cmd
}

func (a *app) limitCommand(use, short, long string, do func(context.Context, string, *control.ChangeLimits) (control.Limits, error), show func(*tabwriter.Writer, *control.Limits)) *cobra.Command {
	var clear bool
	values := make([]string, len(limitFlags))
	_, what, _ := strings.Cut(use, " ")
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Args: args(what),
		RunE: func(cmd *cobra.Command, got []string) error {
			req, err := limitRequest(clear, values, cmd.Flags().Changed)
			if err != nil {
				return err
			}
			l, err := do(cmd.Context(), got[0], req)
			if err != nil {
				return err
			}
			return a.print(l, func(w *tabwriter.Writer) { show(w, &l) })
		},
	}
	for i, f := range limitFlags {
		cmd.Flags().StringVar(&values[i], f.flag, "", f.help)
	}
	cmd.Flags().BoolVar(&clear, "clear", false, "remove all limits first")
	cmd.Flags().SortFlags = false
	return cmd
}

// limitRequest is what the flags ask for, nil if nothing.
func limitRequest(clear bool, values []string, changed func(string) bool) (*control.ChangeLimits, error) {
	req := &control.ChangeLimits{Clear: clear}
	asked := clear
	for i, f := range limitFlags {
		if !changed(f.flag) {
			continue
		}
		asked = true
		if values[i] == "default" {
			req.Unset = append(req.Unset, f.setting)
		} else if err := setLimit(&req.Set, f.setting, values[i]); err != nil {
			return nil, usagef("--%s %q: %v", f.flag, values[i], err)
		}
	}
	if !asked {
		return nil, nil
	}
	return req, nil
}

func setLimit(s *limit.Settings, setting, text string) error {
	if text == "none" {
		text = "0"
	}
	switch setting {
	case "burst_seconds":
		seconds, err := strconv.ParseFloat(text, 64)
		if err != nil {
			d, err := time.ParseDuration(text)
			if err != nil {
				return fmt.Errorf(`must be a duration such as 500ms or 10s, "none" or "default"`)
			}
			seconds = d.Seconds()
		}
		s.Burst = &seconds
		return nil
	case "read_bps", "write_bps", "total_bps", "burst_bytes":
		n, err := parseSize(text)
		if err != nil {
			return fmt.Errorf(`must be a number of bytes, or one with K, M, G or T (powers of 1024), "none" or "default"`)
		}
		return s.SetNumber(setting, n)
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return fmt.Errorf(`must be a number of requests, "none" or "default"`)
	}
	return s.SetNumber(setting, n)
}

// limitText shows a setting as the flags take it.
func limitText(s limit.Settings, setting string) string {
	v, set := s.Value(setting)
	switch {
	case !set:
		return ""
	case v == "0":
		return "none"
	case setting == "burst_seconds":
		return v + "s"
	case strings.HasSuffix(setting, "bps"), setting == "burst_bytes":
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			return v
		}
		return formatSize(n)
	}
	return v
}

func showVolumeLimits(w *tabwriter.Writer, l *control.Limits) {
	row(w, "LIMIT", "VOLUME", "POOL", "IN FORCE")
	for _, f := range limitFlags {
		row(w, f.flag, limitText(l.Own, f.setting), limitText(l.Pool, f.setting), limitText(l.InForce, f.setting))
	}
	if st := l.Stats; st != nil {
		fmt.Fprintln(w)
		limited := "no"
		if st.Limited {
			limited = fmt.Sprintf("yes, by %s: %d requests wait, the longest for %.3gs", flagOf(st.By), st.Waiting, st.OldestSeconds)
		}
		row(w, "limited now", limited)
		row(w, "delayed so far", fmt.Sprintf("%d reads by %.3gs, %d writes by %.3gs", st.ReadsDelayed, st.ReadWait, st.WritesDelayed, st.WriteWait))
	}
}

func showPoolLimits(w *tabwriter.Writer, l *control.Limits) {
	row(w, "LIMIT", "POOL")
	for _, f := range limitFlags {
		row(w, f.flag, limitText(l.Own, f.setting))
	}
}

func flagOf(setting string) string {
	for _, f := range limitFlags {
		if f.setting == setting {
			return f.flag
		}
	}
	return setting
}

func (a *app) volumeSet() *cobra.Command {
	var serial string
	var readOnly bool
	cmd := &cobra.Command{
		Use: "set [POOL/]VOLUME", Short: "Change a volume's serial number or make it read-only",
		Long: `Change what guests see of a volume. One that a guest or tool uses is refused, as a
running guest would not learn of it.`,
		Example: "  scoria volume set vm1 --serial DB0002\n  scoria volume set vm1 --read-only\n  scoria volume set vm1 --read-only=false",
		Args:    args("[POOL/]VOLUME"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := fullName(got[0])
			if err != nil {
				return err
			}
			var req control.SetVolume
			if cmd.Flags().Changed("serial") {
				req.Serial = &serial
			}
			if cmd.Flags().Changed("read-only") {
				req.ReadOnly = &readOnly
			}
			if req == (control.SetVolume{}) {
				return usagef("nothing to change: say --serial or --read-only")
			}
			v, err := a.client().SetVolume(cmd.Context(), name, req)
			if err != nil {
				return err
			}
			return a.print(v, func(w *tabwriter.Writer) { showVolume(w, &v) })
		},
	}
	cmd.Flags().StringVar(&serial, "serial", "", "serial number that the guest sees, 1 to 20 characters")
	cmd.Flags().BoolVar(&readOnly, "read-only", false, "refuse all writes; --read-only=false takes them again")
	return cmd
}
