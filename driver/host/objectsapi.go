package host

import (
	"context"
	"errors"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/asd/disk"
	"scoria/alba/proxy"
	"scoria/alba/repair"
	"scoria/driver/control"
)

// objectError gives the object store's errors their codes.
func objectError(err error) error {
	for target, code := range map[error]control.Code{
		alba.ErrPreset: control.CodeInvalid, alba.ErrName: control.CodeInvalid, alba.ErrNoKey: control.CodeInvalid,
		asd.ErrWrongASD: control.CodeInvalid, asd.ErrInvalid: control.CodeInvalid,
		proxy.ErrForeign: control.CodeInUse, proxy.ErrNoPreset: control.CodeNotFound, proxy.ErrDevice: control.CodeNotFound,
		repair.ErrNoJob: control.CodeNotFound, proxy.ErrOlder: control.CodeInUse, asd.ErrUnavailable: control.CodeUnavailable,
	} {
		if errors.Is(err, target) {
			return &control.Error{Code: code, Message: err.Error()}
		}
	}
	return err
}

// preset loads a preset: CodeNotFound if there is none.
func (o *objectStore) preset(ctx context.Context, name string) (alba.Preset, error) {
	p, err := proxy.LoadPreset(ctx, o.proxy.Registry(), name)
	if errors.Is(err, proxy.ErrNoPreset) {
		return p, control.Errorf(control.CodeNotFound, "no preset %s: make it with `scoria preset create %s`", name, name)
	}
	return p, err
}

func presetAnswer(p *alba.Preset) control.Preset {
	a := control.Preset{Name: p.Name, FragmentBytes: p.FragmentBytes, FailureDomain: p.Domain.String(),
		Compression: p.Compression.String(), Encryption: p.Encryption.String(), Warnings: p.Warnings()}
	for _, pol := range p.Policies {
		a.Policies = append(a.Policies, control.Policy(pol))
	}
	return a
}

// presetRecord reads a preset from a request; what is empty takes the default.
func presetRecord(p *control.Preset) (alba.Preset, error) {
	r := alba.Preset{Name: p.Name, FragmentBytes: p.FragmentBytes}
	if r.FragmentBytes == 0 {
		r.FragmentBytes = alba.DefaultFragment
	}
	for _, pol := range p.Policies {
		r.Policies = append(r.Policies, alba.Policy(pol))
	}
	for _, f := range []struct {
		name, text string
		into       interface{ UnmarshalText([]byte) error }
	}{{"failure domain", p.FailureDomain, &r.Domain}, {"compression", p.Compression, &r.Compression}, {"encryption", p.Encryption, &r.Encryption}} {
		if f.text == "" {
			continue
		}
		if err := f.into.UnmarshalText([]byte(f.text)); err != nil {
			return r, control.Errorf(control.CodeInvalid, "preset %s: %v", p.Name, err)
		}
	}
	return r, objectError(r.Check())
}

// Presets implements control.ObjectBackend.
func (b *backend) Presets(ctx context.Context) ([]control.Preset, error) {
	list, err := b.objects.proxy.Presets(ctx)
	answers := make([]control.Preset, len(list))
	for i := range list {
		answers[i] = presetAnswer(&list[i])
	}
	return answers, objectError(err)
}

// Preset implements control.ObjectBackend.
func (b *backend) Preset(ctx context.Context, name string) (control.Preset, error) {
	p, err := b.objects.preset(ctx, name)
	return presetAnswer(&p), err
}

// CreatePreset implements control.ObjectBackend.
func (b *backend) CreatePreset(ctx context.Context, req control.Preset) (control.Preset, error) {
	if _, err := b.objects.preset(ctx, req.Name); err == nil {
		return control.Preset{}, control.Errorf(control.CodeExists, "preset %s exists already: `scoria preset set %s` changes it", req.Name, req.Name)
	}
	return b.putPreset(ctx, req)
}

// SetPreset implements control.ObjectBackend.
func (b *backend) SetPreset(ctx context.Context, req control.Preset) (control.Preset, error) {
	if _, err := b.objects.preset(ctx, req.Name); err != nil {
		return control.Preset{}, err
	}
	return b.putPreset(ctx, req)
}

func (b *backend) putPreset(ctx context.Context, req control.Preset) (control.Preset, error) {
	p, err := presetRecord(&req)
	if err != nil {
		return control.Preset{}, err
	}
	return presetAnswer(&p), objectError(b.objects.proxy.SetPreset(ctx, p))
}

func asdAnswer(d *repair.DeviceStatus) control.ASD {
	return control.ASD{
		ID: d.ID, Address: d.Address, Host: d.Host, Rack: d.Rack, Datacentre: d.Datacentre, State: string(d.State), Added: d.Added,
		Up: d.Reason == "" && d.State != alba.DeviceRemoved, Reason: d.Reason, DownSince: d.Since.UTC(),
		Damaged: d.Stats.Damaged, Capacity: d.Stats.Capacity, Used: d.Stats.Used, Full: d.Stats.Full, Shards: d.Shards,
		Reopened: d.Stats.Reopened, LastFailure: d.Stats.LastFailure,
	}
}

// ASDs implements control.ObjectBackend.
func (b *backend) ASDs(ctx context.Context) ([]control.ASD, error) {
	st, err := b.objects.keeper.Status(ctx)
	list := make([]control.ASD, len(st.Devices))
	for i := range st.Devices {
		list[i] = asdAnswer(&st.Devices[i])
	}
	return list, objectError(err)
}

// ASD implements control.ObjectBackend.
func (b *backend) ASD(ctx context.Context, id string) (control.ASD, error) {
	list, err := b.ASDs(ctx)
	if err != nil {
		return control.ASD{}, err
	}
	if i := slices.IndexFunc(list, func(a control.ASD) bool { return a.ID == id }); i >= 0 {
		return list[i], nil
	}
	return control.ASD{}, control.Errorf(control.CodeNotFound, "no storage daemon with ID %q: `scoria asd list` shows all", id)
}

// AddASD implements control.ObjectBackend.
func (b *backend) AddASD(ctx context.Context, req control.AddASD) (control.ASD, error) {
	id, err := b.objects.add(ctx, req)
	if err != nil {
		return control.ASD{}, err
	}
	return b.ASD(ctx, id)
}

// add takes a storage daemon in and returns its ID.
func (o *objectStore) add(ctx context.Context, req control.AddASD) (string, error) {
	d := alba.Device{Address: req.Address, Host: req.Host, Rack: req.Rack, Datacentre: req.Datacentre}
	embedded := filepath.IsAbs(d.Address)
	if d.Host == "" {
		d.Host = o.addressHost(d.Address)
	}
	if embedded {
		d.Address = filepath.Clean(d.Address)
		if err := checkASDDir(d.Address); err != nil {
			return "", err
		}
		if d.Rack == "" {
			d.Rack = o.config.Backend.Rack
		}
		if d.Datacentre == "" {
			d.Datacentre = o.config.Backend.Datacentre
		}
	} else if _, _, err := net.SplitHostPort(d.Address); err != nil {
		return "", control.Errorf(control.CodeInvalid, "storage daemon %q: must be an absolute directory, or HOST:PORT of a scoria-asd", d.Address)
	}
	if embedded {
		o.awaitOpening(ctx, d)
	}
	added, err := o.proxy.AddDevice(ctx, d)
	if errors.Is(err, proxy.ErrRemoved) {
		added, err = o.addRemoved(ctx, d, req.Wipe, err)
	}
	if err != nil {
		if embedded && !o.listed(d.Address) {
			err = errors.Join(err, o.release(d.Address))
		}
		return "", objectError(err)
	}
	o.proxy.Fleet().Poll(ctx)
	select {
	case o.first <- struct{}{}:
	default:
	}
	o.log.Info().Str("asd", added.ID).Str("address", added.Address).Msg("storage daemon added")
	return added.ID, nil
}

// addRemoved takes in a disk whose storage daemon was removed, emptied and as another
// one, if the operator says so.
func (o *objectStore) addRemoved(ctx context.Context, d alba.Device, wipe bool, cause error) (alba.Device, error) {
	switch {
	case !filepath.IsAbs(d.Address):
		return d, control.Errorf(control.CodeInvalid, "%v: stop the scoria-asd, empty its directory and start it again: it is another one then", cause)
	case !wipe:
		return d, control.Errorf(control.CodeNeedsForce, "%v: what is on it is of no use any more; with --wipe it is emptied and taken in as another one", cause)
	}
	o.mu.Lock()
	e := o.embedded[d.Address]
	o.mu.Unlock()
	if e == nil || o.listed(d.Address) {
		return d, control.Errorf(control.CodeInUse, "storage daemon in %s: another one that is in use has that directory", d.Address)
	}
	e.mu.Lock()
	id := ""
	if e.disk != nil {
		id = e.disk.ID()
	}
	e.mu.Unlock()
	if err := o.release(d.Address); err != nil {
		return d, err
	}
	if err := disk.Wipe(o.fs, d.Address, id); err != nil {
		return d, err
	}
	o.log.Warn().Str("asd", id).Str("address", d.Address).Msg("the directory of a removed storage daemon was emptied")
	return o.proxy.AddDevice(ctx, d)
}

// listed says whether a storage daemon at the address is in use.
func (o *objectStore) listed(address string) bool {
	return slices.ContainsFunc(o.proxy.Fleet().Members(), func(m *proxy.Member) bool {
		r := m.Record()
		return r.Address == address && r.State != alba.DeviceRemoved
	})
}

// checkASDDir refuses a directory with something else in it: an ASD would fill a
// disk that it shares, and the directory may be a mistake.
func checkASDDir(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return control.Errorf(control.CodeInvalid, "storage daemon in %s: %v", dir, err)
	}
	other := ""
	for _, e := range entries {
		switch e.Name() {
		case "identity", "kv":
			return nil
		case "lost+found", "lock":
		default:
			other = e.Name()
		}
	}
	if other != "" {
		return control.Errorf(control.CodeInvalid, "storage daemon in %s: has %q and no storage daemon's data: must be empty, or one's that was there before", dir, other)
	}
	return nil
}

// DrainASD implements control.ObjectBackend.
func (b *backend) DrainASD(ctx context.Context, id string) (control.ASD, error) {
	a, err := b.ASD(ctx, id)
	if err != nil {
		return a, err
	}
	if a.State == string(alba.DeviceRemoved) {
		return a, control.Errorf(control.CodeInvalid, "storage daemon %s was removed: add it again first", id)
	}
	if err := b.objects.proxy.SetDeviceState(ctx, id, alba.DeviceDraining); err != nil {
		return a, objectError(err)
	}
	return b.ASD(ctx, id)
}

// RemoveASD implements control.ObjectBackend.
func (b *backend) RemoveASD(ctx context.Context, id string, force bool) (control.ASD, error) {
	a, err := b.ASD(ctx, id)
	if err != nil {
		return a, err
	}
	switch {
	case force || a.State == string(alba.DeviceRemoved):
		err = b.objects.proxy.SetDeviceState(ctx, id, alba.DeviceRemoved)
	case a.Shards > 0:
		err = proxy.ErrInUse
	default:
		err = b.objects.keeper.Remove(ctx, id)
	}
	if errors.Is(err, proxy.ErrInUse) {
		return a, control.Errorf(control.CodeNeedsForce,
			"storage daemon %s at %s still holds parts of %d objects, uploads under way included: empty it with `scoria asd drain` first; with --force they are given up and rebuilt from others, and what has too few others is lost", id, a.Address, max(1, a.Shards))
	}
	if err != nil {
		return a, objectError(err)
	}
	b.objects.log.Info().Str("asd", id).Int64("shards", a.Shards).Msg("storage daemon removed")
	if filepath.IsAbs(a.Address) && !b.objects.listed(a.Address) {
		if err := b.objects.release(a.Address); err != nil {
			// It is given up, so this changes nothing for it.
			b.objects.log.Warn().Err(err).Str("asd", id).Msg("the removed storage daemon was not closed in order")
		}
	}
	if now, err := b.ASD(ctx, id); control.CodeOf(err) != control.CodeNotFound {
		return now, err
	}
	a.State, a.Up, a.Shards = string(alba.DeviceRemoved), false, 0 // nothing referred to it: it is forgotten already
	return a, nil
}

// BackendStatus implements control.ObjectBackend.
func (b *backend) BackendStatus(ctx context.Context) (control.BackendStatus, error) {
	st, err := b.objects.keeper.Status(ctx)
	if err != nil {
		return control.BackendStatus{}, objectError(err)
	}
	a := control.BackendStatus{Classes: make([]control.BackendClass, len(st.Classes)), ASDs: make([]control.ASD, len(st.Devices)), Uploads: st.Intents, Trash: st.Trash}
	for i := range st.Devices {
		a.ASDs[i] = asdAnswer(&st.Devices[i])
	}
	for i, c := range st.Classes {
		a.Classes[i] = control.BackendClass{Preset: c.Preset, Policy: control.Policy(c.Policy), FailureDomain: c.Domain.String(), Objects: c.Objects, Bytes: c.Bytes}
		for _, disks := range slices.Sorted(maps.Keys(c.Disks)) {
			a.Classes[i].Safety = append(a.Classes[i].Safety, control.Safety{Disks: disks, Objects: c.Disks[disks]})
		}
	}
	for _, name := range []string{repair.JobRepair, repair.JobVerify, repair.JobRebalance, repair.JobOrphans} {
		j, err := b.BackendJob(ctx, name)
		if err != nil {
			return a, err
		}
		a.Jobs = append(a.Jobs, j)
	}
	return a, nil
}

// BackendJob implements control.ObjectBackend.
func (b *backend) BackendJob(ctx context.Context, name string) (control.BackendJob, error) {
	if !slices.Contains([]string{repair.JobRepair, repair.JobVerify, repair.JobRebalance, repair.JobOrphans}, name) {
		return control.BackendJob{}, control.Errorf(control.CodeNotFound, "no job %q: must be repair, verify, rebalance or orphans", name)
	}
	list, err := b.objects.keeper.Jobs(ctx)
	if err != nil {
		return control.BackendJob{}, err
	}
	a := control.BackendJob{Name: name, State: "never"}
	if i := slices.IndexFunc(list, func(j repair.Job) bool { return j.Name == name }); i >= 0 {
		j := &list[i]
		a = control.BackendJob{Name: name, State: string(j.State), By: j.By, Started: j.Started, Updated: j.Updated,
			Done: j.Done, Total: j.Total, Bytes: j.Bytes, Problems: j.Problems, Message: j.Message}
		if eta, ok := j.ETA(); ok {
			a.ETASeconds = eta.Seconds()
		}
	}
	return a, nil
}

// StartBackendJob implements control.ObjectBackend.
func (b *backend) StartBackendJob(ctx context.Context, name string) (control.BackendJob, error) {
	if len(b.objects.proxy.Fleet().Members()) == 0 {
		return control.BackendJob{}, control.Errorf(control.CodeInvalid, "%s: there is no storage daemon: add one with `scoria asd add`", name)
	}
	if err := b.objects.keeper.Start(ctx, name); err != nil {
		return control.BackendJob{}, objectError(err)
	}
	return b.BackendJob(ctx, name)
}

// RotateKeys implements control.ObjectBackend.
func (b *backend) RotateKeys(ctx context.Context) (control.RotatedKeys, error) {
	n, err := b.objects.proxy.RotateKeys(ctx)
	if errors.Is(err, proxy.ErrOldKeys) {
		return control.RotatedKeys{}, control.Errorf(control.CodeUnavailable,
			"the keys in the registry are wrapped by the master key in use, but keep the older ones: %v; repeat it when these storage daemons are up, or removed", err)
	}
	return control.RotatedKeys{MasterKey: b.objects.proxy.MasterKey(), Namespaces: n}, objectError(err)
}

// StopBackendJob implements control.ObjectBackend.
func (b *backend) StopBackendJob(ctx context.Context, name string) (control.BackendJob, error) {
	if err := b.objects.keeper.Stop(ctx, name); err != nil {
		return control.BackendJob{}, objectError(err)
	}
	return b.BackendJob(ctx, name)
}

var _ control.ObjectBackend = (*backend)(nil)

// objectCollector turns the proxy's counters into metrics.
type objectCollector struct {
	o                     *objectStore
	counters, up, yielded *prometheus.Desc
}

func newObjectCollector(o *objectStore) *objectCollector {
	return &objectCollector{
		o:        o,
		counters: prometheus.NewDesc("scoria_objects_total", "What the object store's proxy counts, by name.", []string{"name"}, nil),
		up:       prometheus.NewDesc("scoria_asd_up", "1 if the storage daemon answers.", []string{"id", "address"}, nil),
		yielded:  prometheus.NewDesc("scoria_objects_yielded_seconds_total", "How long maintenance of the object store gave way to guests.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (c *objectCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.counters
	ch <- c.up
	ch <- c.yielded
}

// Collect implements prometheus.Collector.
func (c *objectCollector) Collect(ch chan<- prometheus.Metric) {
	n := c.o.proxy.Counters()
	for name, v := range map[string]uint64{
		"puts": n.Puts.Load(), "deletes": n.Deletes.Load(), "put_bytes": n.PutBytes.Load(), "adopted": n.Adopted.Load(), "late": n.Late.Load(),
		"reads": n.Reads.Load(), "read_bytes": n.ReadBytes.Load(), "fetched_bytes": n.FetchedBytes.Load(),
		"hedged": n.Hedged.Load(), "decoded": n.Decoded.Load(), "faults": n.Faults.Load(),
	} {
		ch <- prometheus.MustNewConstMetric(c.counters, prometheus.CounterValue, float64(v), name)
	}
	ch <- prometheus.MustNewConstMetric(c.yielded, prometheus.CounterValue, c.o.keeper.Yielded().Seconds())
	for _, m := range c.o.proxy.Fleet().Members() {
		r := m.Record()
		if r.State == alba.DeviceRemoved {
			continue
		}
		up := 1.0
		if reason, _ := m.Down(); reason != "" {
			up = 0
		}
		ch <- prometheus.MustNewConstMetric(c.up, prometheus.GaugeValue, up, r.ID, r.Address)
	}
}
