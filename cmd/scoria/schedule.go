package main

import (
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"scoria/driver/control"
)

func (a *app) scheduleCommand() *cobra.Command {
	return group("schedule", "Have snapshots made and deleted by the clock",
		a.scheduleSet(), a.scheduleList(), a.scheduleShow(), a.scheduleDelete())
}

// target is what the arguments of a schedule's command name.
func target(name string, pool bool) (string, error) {
	if pool {
		if strings.Contains(name, "/") {
			return "", usagef("pool %q: with --pool the name of a pool is wanted, not POOL/VOLUME", name)
		}
		return name, nil
	}
	return fullName(name)
}

func (a *app) completeTargets(pool *bool) func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return func(cmd *cobra.Command, got []string, part string) ([]string, cobra.ShellCompDirective) {
		if *pool {
			return a.completePools(cmd, got, part)
		}
		return a.completeVolumes(cmd, got, part)
	}
}

func (a *app) scheduleSet() *cobra.Command {
	var pool bool
	var req control.SetSchedule
	cmd := &cobra.Command{
		Use: "set [POOL/]VOLUME|--pool POOL RULE...", Short: "Set when snapshots are made and how many are kept",
		Long: `Set the schedule of a volume, or with --pool that of all volumes of a pool that
have none of their own. It replaces the one that there was. Rules are

  every 15m keep 8                      intervals of m, h, d or w, counted from
                                        1970-01-01 00:00 UTC
  hourly at :15 keep 24
  daily at 02:30,14:30 keep 7
  weekly on sun,wed at 02:30 keep 4
  monthly on 1,15 at 02:30 keep 12      31 is the last day of a shorter month

"at" and "on" may be left out: then it is midnight (or the full hour), Sunday and
the 1st. "none" instead of rules: no snapshots, whatever the pool's schedule says.

At each moment that a rule names one snapshot is made, called auto- and the time in
UTC. A rule keeps the first snapshot after each of the last moments it names, as
many as it says; what no rule keeps is deleted. Snapshots that were made by hand
are left alone, and so are those that clones read.

What was due while the daemon did not run is missed: it is reported, and one
snapshot is made instead of all.`,
		Example: "  scoria schedule set vm1 \"every 1h keep 24\" \"daily at 02:30 keep 7\"\n  scoria schedule set --pool default \"daily keep 7\" --zone Europe/Brussels\n  scoria schedule set scratch none",
		Args: func(cmd *cobra.Command, got []string) error {
			if len(got) < 2 {
				return usagef("%q takes a volume (or --pool and a pool) and rules; got %d arguments (see %s --help)", cmd.CommandPath(), len(got), cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := target(got[0], pool)
			if err != nil {
				return err
			}
			if req.Rules = got[1:]; len(got) == 2 && got[1] == "none" {
				req.Rules = []string{}
			}
			s, err := a.client().SetSchedule(cmd.Context(), name, req)
			if err != nil {
				return err
			}
			return a.print(s, func(w *tabwriter.Writer) { showSchedule(w, &s) })
		},
	}
	cmd.ValidArgsFunction = a.completeTargets(&pool)
	cmd.Flags().BoolVar(&pool, "pool", false, "the name is a pool's")
	cmd.Flags().StringVar(&req.Zone, "zone", "", "time zone of the rules, such as Europe/Brussels (default: that of the daemon's host)")
	return cmd
}

func (a *app) scheduleList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List schedules", Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := a.client().Schedules(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w *tabwriter.Writer) {
				row(w, "FOR", "RULES", "VOLUMES", "TROUBLES")
				for i := range list {
					s := &list[i]
					row(w, targetText(s.Target), rulesText(s.Rules), len(s.Volumes), troublesText(s.Volumes))
				}
			})
		},
	}
}

func targetText(target string) string {
	if strings.Contains(target, "/") {
		return "volume " + target
	}
	return "pool " + target
}

func rulesText(rules []string) string {
	if len(rules) == 0 {
		return "none"
	}
	return strings.Join(rules, "; ")
}

func troublesText(volumes []control.ScheduledVolume) string {
	failing, missed := 0, 0
	for i := range volumes {
		if volumes[i].Error != "" {
			failing++
		}
		if len(volumes[i].Missed) > 0 {
			missed++
		}
	}
	var parts []string
	if failing > 0 {
		parts = append(parts, fmt.Sprintf("%d failing", failing))
	}
	if missed > 0 {
		parts = append(parts, fmt.Sprintf("%d missed some", missed))
	}
	return strings.Join(parts, ", ")
}

func (a *app) scheduleShow() *cobra.Command {
	var pool bool
	cmd := &cobra.Command{
		Use: "show [POOL/]VOLUME|--pool POOL", Short: "Show a schedule, and what it did and missed for each volume",
		Args: args("[POOL/]VOLUME|POOL"),
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := target(got[0], pool)
			if err != nil {
				return err
			}
			s, err := a.client().Schedule(cmd.Context(), name)
			if err != nil {
				return err
			}
			return a.print(s, func(w *tabwriter.Writer) { showSchedule(w, &s) })
		},
	}
	cmd.ValidArgsFunction = a.completeTargets(&pool)
	cmd.Flags().BoolVar(&pool, "pool", false, "the name is a pool's")
	return cmd
}

func showSchedule(w *tabwriter.Writer, s *control.Schedule) {
	row(w, "for", targetText(s.Target))
	row(w, "rules", rulesText(s.Rules))
	zone := s.Zone
	if zone == "" {
		zone = "the host's"
	}
	row(w, "time zone", zone)
	row(w, "since", printTime(s.Since))
	if len(s.Volumes) == 0 {
		return
	}
	fmt.Fprintln(w)
	row(w, "VOLUME", "LAST", "NEXT")
	for i := range s.Volumes {
		row(w, s.Volumes[i].Name, s.Volumes[i].Last, printTime(s.Volumes[i].Next))
	}
	fmt.Fprintln(w)
	for i := range s.Volumes {
		v := &s.Volumes[i]
		if v.Error != "" {
			row(w, v.Name, "fails: "+v.Error)
		}
		for _, m := range v.Missed {
			row(w, v.Name, fmt.Sprintf("missed %d of %q, from %s to %s, as was found at %s", m.Count, m.Rule, printTime(m.First), printTime(m.Last), printTime(v.MissedAt)))
		}
		if len(v.Held) > 0 {
			row(w, v.Name, "not deleted, as clones read them: "+strings.Join(v.Held, ", "))
		}
	}
}

func (a *app) scheduleDelete() *cobra.Command {
	var pool bool
	cmd := &cobra.Command{
		Use: "delete [POOL/]VOLUME|--pool POOL", Aliases: []string{"rm"}, Short: "Delete a schedule; the snapshots stay",
		Long: "Delete the schedule of a pool or a volume. A volume without one follows its pool's.\nThe snapshots that there are stay.",
		Args: args("[POOL/]VOLUME|POOL"),
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := target(got[0], pool)
			if err != nil {
				return err
			}
			if err := a.client().DeleteSchedule(cmd.Context(), name); err != nil {
				return err
			}
			return a.print(map[string]string{"deleted": name}, func(w *tabwriter.Writer) { row(w, "deleted", targetText(name)) })
		},
	}
	cmd.ValidArgsFunction = a.completeTargets(&pool)
	cmd.Flags().BoolVar(&pool, "pool", false, "the name is a pool's")
	return cmd
}
