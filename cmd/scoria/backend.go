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
)

func (a *app) presetCommand() *cobra.Command {
	return group("preset", "Manage the rules by which the object store spreads objects",
		a.presetCreate(), a.presetSet(), a.presetList(), a.presetShow())
}

// presetFlags are what a preset is made of.
type presetFlags struct {
	policies                        []string
	fragment                        size
	domain, compression, encryption string
}

func (f *presetFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	// Not a slice flag: that would cut at the commas.
	fl.StringArrayVar(&f.policies, "policy", nil, "K,M,C,X: K data and M parity fragments, of which C must be durable before an upload\nis acknowledged, at most X of an object in one failure domain; repeated in order\nof preference")
	fl.Var(&f.fragment, "fragment-size", "size of fragments that is aimed at, 64K to 4M (default 4M)")
	fl.StringVar(&f.domain, "failure-domain", "", "disk, host, rack or datacentre: what X counts (default disk)")
	fl.StringVar(&f.compression, "compression", "", "none, lz4 or zstd (default none)")
	fl.StringVar(&f.encryption, "encryption", "", "none or aes-256-gcm (default none); needs backend.master_keys in the configuration")
}

// apply puts what was given into p.
func (f *presetFlags) apply(p *control.Preset) error {
	if len(f.policies) > 0 {
		p.Policies = nil
	}
	for _, text := range f.policies {
		pol, err := parsePolicy(text)
		if err != nil {
			return err
		}
		p.Policies = append(p.Policies, pol)
	}
	if f.fragment != 0 {
		p.FragmentBytes = int(min(f.fragment, 1<<31))
	}
	for _, s := range []struct {
		to   *string
		from string
	}{{&p.FailureDomain, f.domain}, {&p.Compression, f.compression}, {&p.Encryption, f.encryption}} {
		if s.from != "" {
			*s.to = s.from
		}
	}
	return nil
}

func parsePolicy(text string) (control.Policy, error) {
	var p control.Policy
	parts := strings.Split(text, ",")
	into := []*int{&p.K, &p.M, &p.C, &p.X}
	if len(parts) != len(into) {
		return p, usagef("--policy %q: must be four numbers K,M,C,X, such as 2,1,2,1", text)
	}
	for i, part := range parts {
		n, err := strconv.Atoi(strings.TrimSpace(part))
		if err != nil {
			return p, usagef("--policy %q: %q is no number: must be K,M,C,X, such as 2,1,2,1", text, part)
		}
		*into[i] = n
	}
	return p, nil
}

func policyText(p control.Policy) string { return fmt.Sprintf("%d,%d,%d,%d", p.K, p.M, p.C, p.X) }

func (a *app) presetCreate() *cobra.Command {
	var f presetFlags
	cmd := &cobra.Command{
		Use: "create NAME --policy K,M,C,X", Short: "Make a preset", Args: args("NAME"),
		Long: `Make a preset. Of its policies the first is used that the storage daemons which
are there can meet; objects stored under a later one are stored anew when that
becomes possible. K fragments suffice to read an object, so M disks may die.`,
		Example: "  scoria preset create safe --policy 4,2,5,1 --policy 2,2,3,1\n  scoria pool create vms --preset safe",
		RunE: func(cmd *cobra.Command, got []string) error {
			p := control.Preset{Name: got[0]}
			if err := f.apply(&p); err != nil {
				return err
			}
			if len(p.Policies) == 0 {
				return usagef("--policy is needed: K,M,C,X, such as 2,1,2,1")
			}
			p, err := a.client().CreatePreset(cmd.Context(), p)
			if err != nil {
				return err
			}
			return a.printPreset(&p)
		},
	}
	f.add(cmd)
	return cmd
}

func (a *app) presetSet() *cobra.Command {
	var f presetFlags
	cmd := &cobra.Command{
		Use: "set NAME", Short: "Change a preset", Args: args("NAME"),
		Long: "Change a preset. What is not given stays; --policy replaces all policies. It holds\nfor objects that are stored from now on.",
		RunE: func(cmd *cobra.Command, got []string) error {
			p, err := a.client().Preset(cmd.Context(), got[0])
			if err != nil {
				return err
			}
			p.Warnings = nil
			if err := f.apply(&p); err != nil {
				return err
			}
			if p, err = a.client().SetPreset(cmd.Context(), p); err != nil {
				return err
			}
			return a.printPreset(&p)
		},
	}
	f.add(cmd)
	return cmd
}

func (a *app) presetList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List presets", Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := a.client().Presets(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w *tabwriter.Writer) {
				row(w, "NAME", "POLICIES", "DOMAIN", "FRAGMENT", "COMPRESSION", "ENCRYPTION")
				for i := range list {
					p := &list[i]
					row(w, p.Name, policiesText(p.Policies), p.FailureDomain, formatSize(uint64(p.FragmentBytes)), p.Compression, p.Encryption)
				}
			})
		},
	}
}

func policiesText(list []control.Policy) string {
	text := make([]string, len(list))
	for i, p := range list {
		text[i] = policyText(p)
	}
	return strings.Join(text, " ")
}

func (a *app) presetShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show a preset", Args: args("NAME"),
		RunE: func(cmd *cobra.Command, got []string) error {
			p, err := a.client().Preset(cmd.Context(), got[0])
			if err != nil {
				return err
			}
			return a.printPreset(&p)
		},
	}
}

func (a *app) printPreset(p *control.Preset) error {
	return a.print(p, func(w *tabwriter.Writer) {
		row(w, "name", p.Name)
		row(w, "policies (K,M,C,X)", policiesText(p.Policies))
		row(w, "failure domain", p.FailureDomain)
		row(w, "fragment size", formatSize(uint64(p.FragmentBytes)))
		row(w, "compression", p.Compression)
		row(w, "encryption", p.Encryption)
		for _, text := range p.Warnings {
			row(w, "warning", text)
		}
	})
}

func (a *app) backendCommand() *cobra.Command {
	return group("backend", "Show how safe the object store is, and its maintenance", a.backendStatus(),
		a.maintenance("repair", "Rebuild what disks lost, empty those that are drained, upgrade objects; always on unless stopped"),
		a.maintenance("verify", "Read everything and repair what is bad"),
		a.maintenance("rebalance", "Move parts of objects from full disks to empty ones"), a.rotateKeys(), a.rebuildRegistry())
}

func (a *app) rotateKeys() *cobra.Command {
	return &cobra.Command{
		Use: "rotate-keys", Short: "Encrypt the keys of volumes with the master key in use", Args: args(),
		Long: `Each volume of a preset that encrypts has a key of its own, which is kept encrypted
with a master key, in the registry and on the storage daemons. To replace the master
key, put the new one on the first line of the file that backend.master_keys names, above
the old one, restart scoriad, and run this. Once it succeeds the old one is needed no
more: remove it and restart scoriad again. It fails as long as a storage daemon can't be
told, and may be repeated. Data is not encrypted anew.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := a.client().RotateKeys(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(k, func(w *tabwriter.Writer) {
				row(w, "master key in use", k.MasterKey)
				row(w, "keys encrypted anew", k.Namespaces)
			})
		},
	}
}

func (a *app) backendStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show how many more disks may die, by kind of object", Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.client().BackendStatus(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(st, func(w *tabwriter.Writer) { showBackend(w, &st) })
		},
	}
}

func showBackend(w *tabwriter.Writer, st *control.BackendStatus) {
	row(w, "PRESET", "POLICY", "DOMAIN", "OBJECTS", "SIZE", "DISKS THAT MAY STILL DIE")
	for i := range st.Classes {
		c := &st.Classes[i]
		for j, s := range c.Safety {
			disks := strconv.Itoa(s.Disks)
			if s.Disks < 0 {
				disks = "none: UNREADABLE NOW"
			}
			total := ""
			if j == 0 {
				total = formatSize(uint64(c.Bytes))
			}
			row(w, c.Preset, policyText(c.Policy), c.FailureDomain, s.Objects, total, disks)
		}
	}
	fmt.Fprintln(w)
	asdTable(w, st.ASDs)
	fmt.Fprintln(w)
	row(w, "JOB", "STATE", "PROGRESS", "LEFT", "PROBLEMS", "MESSAGE")
	for i := range st.Jobs {
		j := &st.Jobs[i]
		row(w, j.Name, j.State, progressText(j), etaText(j), j.Problems, j.Message)
	}
	fmt.Fprintln(w)
	row(w, "uploads under way", st.Uploads)
	row(w, "deleted, being removed", st.Trash)
}

func progressText(j *control.BackendJob) string {
	if j.Total <= 0 {
		return ""
	}
	return fmt.Sprintf("%d%%", min(max(j.Done, 0), j.Total)*100/j.Total)
}

func etaText(j *control.BackendJob) string {
	if j.ETASeconds <= 0 {
		return ""
	}
	return time.Duration(j.ETASeconds * float64(time.Second)).Round(time.Second).String()
}

// maintenance is the commands of one job.
func (a *app) maintenance(name, short string) *cobra.Command {
	sub := func(use, short string, fn func(c *control.Client, ctx context.Context, name string) (control.BackendJob, error)) *cobra.Command {
		return &cobra.Command{
			Use: use, Short: short, Args: args(),
			RunE: func(cmd *cobra.Command, _ []string) error {
				j, err := fn(a.client(), cmd.Context(), name)
				if err != nil {
					return err
				}
				return a.print(j, func(w *tabwriter.Writer) { showBackendJob(w, &j) })
			},
		}
	}
	return group(name, short,
		sub("status", "Show how far it is", (*control.Client).BackendJob),
		sub("start", "Start it, or go on after a stop", (*control.Client).StartBackendJob),
		sub("stop", "Stop it until it is started again", (*control.Client).StopBackendJob))
}

func showBackendJob(w *tabwriter.Writer, j *control.BackendJob) {
	row(w, "job", j.Name)
	row(w, "state", j.State)
	row(w, "progress", progressText(j))
	row(w, "time left", etaText(j))
	row(w, "read or written", formatSize(uint64(j.Bytes)))
	row(w, "problems", j.Problems)
	row(w, "message", j.Message)
	row(w, "started", printTime(j.Started))
	row(w, "updated", printTime(j.Updated))
}
