package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// backend answers the control API.
type backend struct {
	*VolumeSet
	status func(ctx context.Context) control.Status // what only the daemon knows
	config Config

	schedules *scheduler
	objects   *objectStore
}

var _ control.Backend = (*backend)(nil)

func (b *backend) Status(ctx context.Context) (control.Status, error) {
	st := b.status(ctx)
	names, err := b.Names(ctx)
	if err != nil {
		return st, err
	}
	st.Volumes = len(names)
	b.each(func(_ string, dev Volume) {
		st.Open++
		if _, held := dev.Holder(); held {
			st.InUse++
		}
	})
	return st, nil
}

func (b *backend) Pools(ctx context.Context) ([]control.Pool, error) {
	pools, err := registry.LoadAll[registry.Pool](ctx, b.reg, registry.PoolPrefix)
	if err != nil {
		return nil, err
	}
	volumes, err := registry.LoadAll[registry.Volume](ctx, b.reg, registry.VolumePrefix)
	if err != nil {
		return nil, err
	}
	count := map[string]int{}
	for i := range volumes {
		count[volumes[i].Record.Pool]++
	}
	list := make([]control.Pool, len(pools))
	for i := range pools {
		list[i] = poolAnswer(&pools[i].Record, count[pools[i].Record.Name])
	}
	return list, nil
}

func poolAnswer(r *registry.Pool, volumes int) control.Pool {
	return control.Pool{Name: r.Name, BlockSize: r.BlockSize, SCOSize: r.SCOSize, Created: r.Created, Volumes: volumes, Store: poolStore(r), Preset: r.Preset}
}

func (b *backend) Pool(ctx context.Context, name string) (control.Pool, error) {
	e, err := b.loadPool(ctx, name)
	if err != nil {
		return control.Pool{}, err
	}
	kvs, err := b.reg.List(ctx, registry.VolumeKey(name, ""))
	return poolAnswer(&e.Record, len(kvs)), err
}

func (b *backend) loadPool(ctx context.Context, name string) (registry.Entry[registry.Pool], error) {
	if err := registry.CheckName("pool", name); err != nil {
		return registry.Entry[registry.Pool]{}, control.Errorf(control.CodeNotFound, "no pool %q: %v", name, err)
	}
	e, err := registry.Load[registry.Pool](ctx, b.reg, registry.PoolKey(name))
	if errors.Is(err, registry.ErrNotFound) {
		return e, control.Errorf(control.CodeNotFound, "no pool %s", name)
	}
	return e, err
}

func (b *backend) CreatePool(ctx context.Context, req control.CreatePool) (control.Pool, error) {
	r := registry.Pool{Name: req.Name, Preset: req.Preset, BlockSize: req.BlockSize, SCOSize: req.SCOSize, Created: time.Now().UTC().Truncate(time.Second)}
	if r.BlockSize == 0 {
		r.BlockSize = b.config.Pool.BlockSize
	}
	if r.SCOSize == 0 {
		r.SCOSize = int64(b.config.Pool.SCOSize)
	}
	switch err := registry.CheckName("pool", r.Name); {
	case err != nil:
		return control.Pool{}, control.Errorf(control.CodeInvalid, "%v", err)
	case r.BlockSize != 512 && r.BlockSize != 4096:
		return control.Pool{}, control.Errorf(control.CodeInvalid, "pool %s: block size %d: must be 512 or 4096", r.Name, r.BlockSize)
	case r.SCOSize < driver.MinSCOBytes || r.SCOSize > driver.MaxSCOBytes || r.SCOSize%driver.MinSCOBytes != 0:
		return control.Pool{}, control.Errorf(control.CodeInvalid, "pool %s: SCO size %d: must be a multiple of 1 MiB from 1 MiB to 1 GiB", r.Name, r.SCOSize)
	}
	err := b.choosePoolStore(ctx, &r, req.Store)
	if err != nil {
		return control.Pool{}, err
	}
	_, err = registry.Create(ctx, b.reg, registry.PoolKey(r.Name), r)
	if errors.Is(err, registry.ErrExist) {
		return control.Pool{}, control.Errorf(control.CodeExists, "pool %s exists already", r.Name)
	}
	return poolAnswer(&r, 0), err
}

func (b *backend) DeletePool(ctx context.Context, name string) error {
	e, err := b.loadPool(ctx, name)
	if err != nil {
		return err
	}
	kvs, err := b.reg.List(ctx, registry.VolumeKey(name, ""))
	if err != nil {
		return err
	}
	if len(kvs) > 0 {
		return control.Errorf(control.CodeInUse, "pool %s has %d volumes: delete them first", name, len(kvs))
	}
	if name == registry.DefaultPool {
		return control.Errorf(control.CodeInvalid, "pool %s is where volumes named without a pool go: it can't be deleted", name)
	}
	if err := registry.Remove(ctx, b.reg, registry.PoolKey(name), e.Revision); err != nil {
		return err
	}
	// A pool that gets this name later does not begin with this one's schedule.
	err = b.deleteSchedule(ctx, name, registry.PoolScheduleKey(name))
	if control.CodeOf(err) == control.CodeNotFound {
		return nil
	}
	return err
}

func (b *backend) Volumes(ctx context.Context, pool string) ([]control.Volume, error) {
	prefix := registry.VolumePrefix
	if pool != "" {
		if _, err := b.loadPool(ctx, pool); err != nil {
			return nil, err
		}
		prefix = registry.VolumeKey(pool, "")
	}
	entries, err := registry.LoadAll[registry.Volume](ctx, b.reg, prefix)
	if err != nil {
		return nil, err
	}
	list := make([]control.Volume, len(entries))
	for i := range entries {
		list[i] = b.answer(&entries[i].Record)
	}
	return list, b.relate(ctx, entries, list)
}

func (b *backend) Volume(ctx context.Context, name string) (control.Volume, error) {
	e, err := b.load(ctx, name)
	if err != nil {
		return control.Volume{}, err
	}
	v := b.answer(&e.Record)
	snapshots, err := registry.Snapshots(ctx, b.reg, e.Record.ID)
	if err != nil {
		return v, err
	}
	v.Snapshots = len(snapshots)
	v.Conditions = append(v.Conditions, adoptedCondition(v.Name, snapshots)...)
	all, err := registry.LoadAll[registry.Volume](ctx, b.reg, registry.VolumePrefix)
	if err != nil {
		return v, err
	}
	v.Clones, v.Parent = registry.ClonesAmong(all, e.Record.ID, uuid.Nil), parentName(all, &e.Record)
	return v, nil
}

func (b *backend) answer(r *registry.Volume) control.Volume {
	name := r.FullName()
	v := control.Volume{
		Name: name, ID: r.ID, Size: r.Size, BlockSize: r.BlockSize, SCOSize: r.SCOSize, Serial: r.Serial,
		ReadOnly: r.ReadOnly, Created: r.Created, State: string(r.State), Owner: r.Owner, Epoch: r.Epoch,
		UsedBy: b.usedBy(name), Socket: b.socketPath(r.Pool, r.Name), Conditions: []control.Condition{},
		Template: r.Template, Preset: r.Preset,
	}
	if r.Parent != nil {
		v.Parent = r.Parent.Name
	}
	if i := r.Incomplete; i != nil {
		v.Incomplete = &control.Incomplete{Kind: i.Kind, Snapshot: i.Snapshot, Position: i.Position, Resumable: i.Resumable}
	}
	if b.config.NBD.Enabled {
		v.NBD = "nbd+unix:///" + name + "?socket=" + b.config.nbdSocket()
	}
	if dev := b.device(name); dev != nil {
		v.Open = true
		st := dev.Stats()
		v.Conditions = conditionsAnswer(st.Conditions)
		space := spaceAnswer(st.Space)
		v.Space = &space
	}
	v.Conditions = append(v.Conditions, b.troubles(name)...)
	v.Conditions = append(v.Conditions, b.schedules.conditions(r.ID)...)
	b.mu.Lock()
	fronts := b.fronts
	b.mu.Unlock()
	for _, f := range fronts {
		if t, ok := f.(troubled); ok {
			v.Conditions = append(v.Conditions, t.Troubles(name)...)
		}
		if reason, when := f.LastDisconnect(name); reason != "" && when.After(v.LastDisconnectTime) {
			v.LastDisconnect, v.LastDisconnectTime = reason, when.UTC()
		}
	}
	return v
}

// troubles are what keeps a volume from being served.
func (h *VolumeSet) troubles(name string) []control.Condition {
	h.mu.Lock()
	defer h.mu.Unlock()
	v, ok := h.volumes[name]
	if !ok {
		return nil
	}
	list := append([]control.Condition{}, v.notices...)
	if v.unsettled != "" {
		list = append(list, control.Condition{Code: "snapshots-unsettled", Message: "what became of a snapshot could not be recorded: " + v.unsettled + "; tried again every few seconds"})
	}
	for _, text := range v.frontErrors {
		list = append(list, control.Condition{Code: "not-served", Message: text})
	}
	switch {
	case v.dev == nil && v.openErr != nil && (v.awaited || v.insisting) && !hopeless(v.openErr):
		list = append(list, control.Condition{Code: "opening", Message: v.waitingText()})
	case v.dev == nil && v.openErr != nil && v.awaited:
		list = append(list, control.Condition{Code: "open-failed", Message: v.openErr.Error() + "; waiting does not mend that, so it is not tried again by itself: `scoria volume check " + name + "` does, and says more"})
	case v.dev == nil && v.openErr != nil:
		list = append(list, control.Condition{Code: "open-failed", Message: v.openErr.Error()})
	case v.awaited:
		list = append(list, control.Condition{Code: "opening", Message: "it is being opened; its sockets are there as soon as that has ended"})
	}
	return list
}

// waitingText says what the opening of a volume waits for. Caller holds mu.
func (v *volume) waitingText() string {
	text := "waiting for what it needs to be opened: " + v.openErr.Error() + "; it is tried again every few seconds; if it is the store that does not answer, `scoria asd list` says which storage daemon is down and why"
	if v.awaited {
		text += "; its socket is there when it is open, and a guest goes on then"
	}
	return text
}

// waiting lists the volumes whose opening waits for something.
func (h *VolumeSet) waiting() []control.Condition {
	h.mu.Lock()
	defer h.mu.Unlock()
	var names []string
	for name, v := range h.volumes {
		if v.dev == nil && v.openErr != nil && (v.awaited || v.insisting) && !hopeless(v.openErr) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	return []control.Condition{{Code: "opening", Message: fmt.Sprintf("waiting to open %s: %s; tried again every few seconds (`scoria volume show` says more)",
		strings.Join(names[:min(len(names), maxWaitingNames)], ", "), h.volumes[names[0]].openErr)}}
}

// maxWaitingNames bounds what the daemon's status names.
const maxWaitingNames = 8

func (b *backend) CreateVolume(ctx context.Context, req control.CreateVolume) (control.Volume, error) {
	r, err := b.create(ctx, req)
	if err != nil {
		return control.Volume{}, err
	}
	return b.answer(&r), nil
}

func (b *backend) ResizeVolume(ctx context.Context, name string, size uint64, force bool) (control.Volume, error) {
	r, err := b.resize(ctx, name, size, force)
	if err != nil {
		return control.Volume{}, err
	}
	return b.answer(&r), nil
}

func (b *backend) Stats(ctx context.Context, name string) (control.VolumeStats, error) {
	if _, err := b.load(ctx, name); err != nil {
		return control.VolumeStats{}, err
	}
	dev, err := b.open(ctx, name)
	if err != nil {
		return control.VolumeStats{}, err
	}
	answer, err := statsAnswer(name, dev.Stats())
	if l := b.limits(name); l != nil {
		addLimitCounters(answer.Counters, l.Stats())
	}
	return answer, err
}

// statsAnswer carries every figure of driver.Stats over, by the names of its
// JSON, so that one added there shows everywhere.
func statsAnswer(name string, st driver.Stats) (control.VolumeStats, error) {
	answer := control.VolumeStats{
		Name: name, Ops: map[string]control.OpStats{}, Counters: map[string]uint64{}, Space: spaceAnswer(st.Space),
		Conditions: conditionsAnswer(st.Conditions),
	}
	for op, o := range st.Ops {
		answer.Ops[block.Op(op).String()] = control.OpStats{Count: o.Count, Bytes: o.Bytes, Errors: o.Errors}
	}
	counters, err := statCounters(st)
	answer.Counters = counters
	return answer, err
}

func spaceAnswer(s driver.Space) control.Space {
	return control.Space{
		Live: s.Live, Snapshots: s.Snapshots, Garbage: s.Garbage, Overhead: s.Overhead, Inherited: s.Inherited,
		Local: s.Local, Store: s.Store,
	}
}

// statCounters returns the whole numbers of driver.Stats by their JSON names.
func statCounters(st driver.Stats) (map[string]uint64, error) {
	b, err := json.Marshal(st)
	if err != nil {
		return nil, err
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(b, &fields); err != nil {
		return nil, err
	}
	counters := map[string]uint64{}
	for name, raw := range fields {
		var n uint64
		if json.Unmarshal(raw, &n) == nil && string(raw) != "null" {
			counters[name] = n
		}
	}
	return counters, nil
}

func conditionsAnswer(list []driver.Condition) []control.Condition {
	answer := make([]control.Condition, len(list))
	for i, c := range list {
		answer[i] = control.Condition{Code: c.Code, Message: c.Message}
	}
	return answer
}

func (b *backend) CheckDelete(ctx context.Context, name string, force bool) error {
	if !force {
		b.findSnapshots(ctx, name)
	}
	_, err := b.checkDelete(ctx, name, force)
	return err
}

func (b *backend) DeleteVolume(ctx context.Context, name string, force bool, _ control.Progress) error {
	return b.remove(ctx, name, force)
}

func (b *backend) CheckVolume(ctx context.Context, name string, p control.Progress) (control.CheckReport, error) {
	r, err := b.check(ctx, name, p)
	if err != nil {
		return control.CheckReport{}, fmt.Errorf("check volume %s: %w", name, err)
	}
	if len(r.Problems) > 0 {
		b.log.Error().Str("volume", name).Strs("problems", r.Problems).Msg("check found problems")
	}
	return control.CheckReport{SCOs: r.SCOs, Clusters: r.Clusters, Bytes: r.Bytes, Problems: append([]string{}, r.Problems...)}, nil
}
